"""Measured runs as graphs add up to what is predicted of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.bench.predict import Predictor
from meshwright.bench.run_graph_file import read_run_graphs, write_run_graphs
from meshwright.bench.run_graphs import run_graphs
from meshwright.errors import BadRequest
from meshwright.gnn_cost.steps.correction import STEP_FEATURES
from tests.bench.given_runs import run


def test_rows_and_rest_make_the_step() -> None:
    predictor = Predictor()
    runs = [run(), run(run_id="small-2", micro_batch=4), run(run_id="untimed", step_time_s=None)]

    found = run_graphs(runs, predictor)

    assert ["small-1", "small-2"] == [item.run_id for item in found.runs]
    assert ["untimed"] == [item.run_id for item in found.skipped]
    graphs = found.graphs
    assert 2 == graphs.count
    assert [0, 1] == np.unique(graphs.graph).tolist()
    assert graphs.work.count == len(graphs.graph) == len(graphs.weight)
    assert graphs.work.edges.max() < graphs.work.count
    assert [0.5, 0.5] == graphs.time_s.tolist()
    assert ["4", "4"] == graphs.labels["layers"].tolist()
    assert (found.launch_s <= graphs.rest_s).all()
    predicted_s = [predictor.priced(item).cost().time_s for item in found.runs]
    assert (graphs.rest_s < predicted_s).all()
    np.testing.assert_allclose(predicted_s, found.predicted_s, rtol=1e-9)
    assert (2, len(STEP_FEATURES)) == found.features.shape
    assert np.isfinite(found.features).all()


def test_a_file_of_graphs_gives_them_back(tmp_path: Path) -> None:
    found = run_graphs([run(), run(run_id="small-2", micro_batch=4)])
    path = tmp_path / "runs.npz"
    write_run_graphs(path, found, priced_by="analytic")
    again = read_run_graphs(path, priced_by="analytic")

    assert again is not None
    assert found.runs == again.runs
    assert found.graphs.devices == again.graphs.devices
    assert found.predicted_s.tolist() == again.predicted_s.tolist()
    second = again.where(np.array([False, True]))
    assert ["small-2"] == [item.run_id for item in second.runs]
    assert len(second.row_s) == second.graphs.work.count
    assert read_run_graphs(path, priced_by="learned") is None
    assert read_run_graphs(tmp_path / "none.npz", priced_by="analytic") is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadRequest, match="damaged graphs of runs"):
        read_run_graphs(path, priced_by="analytic")
