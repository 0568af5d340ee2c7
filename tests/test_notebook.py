"""The quickstart notebook: whole, executed as it stands, with its plots; and it runs from top to bottom."""

import nbformat
import pytest
from nbclient import NotebookClient
from snippets import ROOT


FILE = ROOT / "notebooks" / "quickstart.ipynb"


def test_it_is_stored_with_the_outputs_of_one_run():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        compile(cell.source, FILE.name, "exec")
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert "/home/" not in str(outputs) and "/tmp/" not in str(outputs)
    assert FILE.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(FILE, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "runs" / "quickstart" / "hybrid" / "model.safetensors").is_file()
