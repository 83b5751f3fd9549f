"""What needs an optional package, serves one experiment, or only measures. Training and fitting
work without this folder."""


def need(module, package):
    """Import `module` or end in one line that says how to install its package."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise SystemExit(f"this needs the package {package}: pip install {package}") from None
