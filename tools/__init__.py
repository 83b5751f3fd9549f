"""What needs an optional package, serves one experiment, or only measures.

Training and fitting work without this folder."""
import os
import re
import signal
import warnings
from pathlib import Path


def need(module, package):
    """Import `module` or end in one line that says how to install its package."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise SystemExit(f"this needs the package {package}: pip install {package}") from None


def make_folder(out):
    """Makes a folder to write into, or ends in one line."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {out}: {error.strerror}; choose another folder") from None


def end_with_the_pipe():
    """Let `| head` end a command that prints, without a traceback."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def split_launcher(text):
    """What torchrun printed -> the output of the ranks, and its report of how they ended, or ""."""
    own, *report = re.split(r"^[WE]\d{4} .*torch/distributed/elastic", text, maxsplit=1,
                            flags=re.MULTILINE)
    return own, "".join(report)


def usable_cores():
    """Cores that this process may use, which on a shared machine can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def panels(n):
    """A page and its n panels, at most three in a row. A README shows a page 830 pixels wide, where
    letters of 8 points are readable only if the page has no more than these 8.3 inches."""
    rows = -(-n // 3)
    page = need("matplotlib.figure", "matplotlib").Figure((8.3, 3 * rows), layout="constrained")
    share = [n // rows + (i < n % rows) for i in range(rows)]
    return page, [ax for part, k in zip(page.subfigures(rows, 1, squeeze=False).ravel(), share)
                  for ax in part.subplots(1, k, squeeze=False).ravel()]


def style(k, line=True):
    """Colour, marker and line of group k, so that groups differ in grey and to the colour-blind."""
    return {"color": ("k", "C1", "C0", "C4", "C7")[k % 5], "marker": "o^sDvPX*"[k % 8],
            "mfc": "none", "ms": 4.5, "ls": ("-", "--", "-.", ":")[k % 4] if line else ""}


def human(x, _=None):
    """2.75e8 -> 275M, also as matplotlib's formatter of ticks."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if 0.9995 * scale <= x < 999.5 * scale:
            return f"{x / scale:.3g}{unit}"
    return f"{x:.3g}"


def markdown(head, *rows):
    """A table; its cells are text."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def save(page, path):
    """Write a figure, or end in one line that says why it cannot be written there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that no font has is drawn as a box
            page.savefig(path, dpi=min(150, 30000 / page.get_figheight()))  # below 2^15 lines
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise SystemExit(f"cannot write the picture {path}: {error}") from None
    print(f"wrote {path}")
