"""A game for a course: guess the losses of the largest models, and beat the scaling law.

    python -m tools.game results/laptop_study.jsonl
    python -m tools.game results/laptop_study.jsonl --group late --guess 0.5,0.4,0.3,0.25,0.2

It shows a study without its largest models and asks for the losses of five of them, given their
parameters N and tokens D. Then it scores the guesses, and the law that fits what was shown.
"""
import numpy as np

from data import check
from fit_laws import fit_law, gather, number, parse_args, predict
from tools import end_with_the_pipe, human
from train import Parser


def split(runs):
    """Runs -> the runs to show, and N, D and loss (3, n) of hidden ones, averaged over seeds."""
    large = runs.N == runs.N.max()
    tokens = np.unique(runs.D[large])
    tokens = tokens[np.linspace(0, len(tokens) - 1, min(5, len(tokens))).round().astype(int)]
    hidden = [(runs.N.max(), D, runs.L[large & (runs.D == D)].mean()) for D in tokens]
    return runs.rows(~large), np.transpose(hidden)


def show(runs):
    """Print the losses, with a line for each N and a column for each D."""
    print(f"{runs.name}: losses of all models but the largest")
    tokens = np.unique(runs.D)
    print(f"{'N':>12}  D" + "".join(f"{human(D):>9}" for D in tokens))
    for N in np.unique(runs.N):
        cells = [runs.L[(runs.N == N) & (runs.D == D)] for D in tokens]
        texts = [f"{L.mean():9.3f}" if len(L) else 9 * " " for L in cells]
        print(f"{N:12,.0f}   " + "".join(texts))


def answer(question):
    """What the player types, asked again until it is a loss."""
    while not 0 < number(text := input(question)) < np.inf:
        print("a loss is a number above 0, such as 0.3")
    return text


def ask(hidden, given):
    """The guesses (n,): those of --guess, or what the player types."""
    try:
        guesses = given.split(",") if given else [
            answer(f"loss of N {N:,.0f} after D {D:,.0f} tokens? ") for N, D, _ in hidden.T]
    except (EOFError, KeyboardInterrupt):
        check(False, "there is nobody to ask; give the losses with --guess")
    found = np.array([number(guess) for guess in guesses])
    check(len(found) == len(hidden[0]) and ((found > 0) & (found < np.inf)).all(),
          f"guesses {', '.join(guesses)}: give {len(hidden[0])} losses above 0, as --guess 0.3,0.2")
    return found


def score(guesses, law, hidden):
    """Print each guess beside the law and the truth; -> mean errors of both in per cent."""
    errors = 100 * np.abs(np.array([guesses, law]) / hidden[2] - 1)
    print(f"\n{'N':>12}{'D':>9}{'you':>9}{'law':>9}{'truth':>9}   you and the law are off by")
    for (N, D, truth), guess, fitted, off in zip(hidden.T, guesses, law, errors.T):
        print(f"{N:12,.0f}{human(D):>9}{guess:9.3f}{fitted:9.3f}{truth:9.3f}   "
              "{:.1f} % and {:.1f} %".format(*off))
    you, fit = errors.mean(1)
    winner = "you beat the law" if you < fit else "the law wins"
    print(f"\nYour mean error is {you:.1f} %, that of the law is {fit:.1f} %: {winner}.")
    return you, fit


def main(argv=None):
    parser = Parser(prog="python -m tools.game", description=__doc__)
    parser.add_argument("path", help="a table that fit_laws.py reads")
    parser.add_argument("--group", help="family of models (default: the first)")
    parser.add_argument("--guess", help="losses, as 0.3,0.2 (default: ask)")
    args = parser.parse_args(argv)
    _, studies = gather(parse_args([args.path, "--bootstrap", "0"]))
    groups = {study.runs.name: study.runs for study in studies}
    name = args.group or studies[0].runs.name
    check(name in groups, f"--group: no group {name!r}; groups: {', '.join(groups)}")
    shown, hidden = split(groups[name])
    show(shown)
    law = predict(fit_law(shown).coef, *hidden[:2])
    return score(ask(hidden, args.guess), law, hidden)


if __name__ == "__main__":
    end_with_the_pipe()
    main()
