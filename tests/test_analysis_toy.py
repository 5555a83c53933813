"""The paper's two-dimensional function, and the descents on it."""

import json
from pathlib import Path

import pytest
import torch

from xsam_hf.analysis import toy
from xsam_hf.analysis.__main__ import main


@pytest.mark.parametrize(
    "minimum, value, curvatures", [(toy.SHARP, 0.2752, (2.4e-3, 4.9e-3)), (toy.FLAT, 0.3564, (3.3e-4, 6.8e-4))]
)
def test_the_two_minima(minimum, value, curvatures):
    point = torch.tensor(minimum, dtype=torch.float64)
    assert float(toy.loss(point)) == pytest.approx(value, abs=5e-5)
    assert torch.func.grad(toy.loss)(point).norm() < 1e-4
    assert torch.linalg.eigvalsh(torch.func.hessian(toy.loss)(point)).tolist() == pytest.approx(curvatures, rel=0.02)


def test_off_the_domain_the_loss_is_not_finite():
    assert not toy.loss(torch.tensor([[0.0, 0.0], [0.0, -1.0]])).isfinite().any()


@pytest.mark.parametrize("start", [toy.START, (10.0, 4.0)])
def test_many_descents_at_a_time_are_those_of_xsam_gradient(start):
    ends = {}
    for method, arguments in toy.METHODS.items():
        ends[method] = toy.descend(start, arguments, steps=6).points[-1]
        together = toy.descend_all(torch.tensor([start, toy.SHARP]), arguments, steps=6)
        torch.testing.assert_close(together[0], ends[method], rtol=1e-9, atol=0)
    # From the second start the first ascent leaves the domain, and all three begin with g_0.
    begun = [toy.descend(start, arguments, steps=1).points[-1] for arguments in toy.METHODS.values()]
    assert all(torch.equal(begun[0], point) == (start != toy.START) for point in begun[1:])


def test_the_basin_map():
    # An independent computation gave .568, .627 and .843 (213, 235 and 316 of 375). It takes NaN for g_1 where that is not finite,
    # and α = 0 where no loss of the search is; `xsam_gradient` falls back to g_0 and keeps α, which saves two starts and one.
    found = toy.basins()
    shares = {method: round(found.share(method) * 375) for method in toy.METHODS}
    assert shares == {"SGD": 213, "SAM": 235 + 2, "XSAM": 316 + 1}
    # 33 of SAM's hover at the saddle between the two, and count for the nearer one.
    lost = {method: int(found.flat[method].isnan().sum()) for method in toy.METHODS}
    assert lost == {"SGD": 0, "SAM": 19 - 2, "XSAM": 18 - 1}
    kept = json.loads((Path(__file__).parents[1] / "results" / "toy.json").read_text())
    assert found.as_json() == kept and [len(kept["flat"]["SAM"]), *map(len, kept["flat"]["SAM"])] == [25, *[15] * 25]


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "descend", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`output_dir` is .*file, a file: give a folder"):
        main(["toy", "--output_dir", str(tmp_path / "file")])
    with pytest.raises(NotADirectoryError):
        main(["toy", "--output_dir", str(tmp_path / "file" / "below")])
