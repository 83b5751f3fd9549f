"""What needs an optional package, serves one experiment, or only measures.

Training and fitting work without this folder."""
import os
import signal


def need(module, package):
    """Import `module` or end in one line that says how to install its package."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise SystemExit(f"this needs the package {package}: pip install {package}") from None


def save_figure(figure, path, dpi):
    """Write a picture or end in one line: there may be no such folder, or no such format."""
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot write {path}: {error}") from None


def end_with_the_pipe():
    """`| head` ends a command that prints, without a traceback."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def usable_cores():
    """Cores that this process may use, which on a shared machine can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
