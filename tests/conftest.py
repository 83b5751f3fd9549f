"""Some tests compare with public tables, vocabularies and documents that lie beside the repository
in ../shared, as they do where CI runs. Elsewhere those tests, and only those, are skipped."""

import inspect
import os
import re
from pathlib import Path

import pytest

# One thread each, also for the processes that tests start: tiny matrices are slower with more, and
# another number of threads adds in another order. (It is read when torch and numpy are imported.)
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    if SHARED.is_dir():
        return
    for item in items:
        if re.search(r"\b(SHARED|VAL|ALT|FITS|shared)\b", inspect.getsource(item.function)):
            item.add_marker(pytest.mark.skip(reason="needs ../shared, which is not published"))


@pytest.fixture
def printed(capsys):
    """What a call prints."""
    def run(function, *args):
        function(*args)
        return capsys.readouterr().out
    return run


@pytest.fixture
def pages(monkeypatch):
    """The figures that are written, by their names."""
    found = {}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda page, path, **_: found.setdefault(str(path), page))
    return found
