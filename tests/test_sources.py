"""Which code a stage runs."""

from pipeline import sources


def test_the_import_closure_follows_imports_inside_functions():
    closure = {path.name for path in sources.import_closure("pipeline.stages.train")}
    assert {"training.py", "store.py", "moe.py", "config.py"} <= closure
    assert not {"report.py", "corpus.py", "checkpoint.py"} & closure
