"""The search space: what is drawn, what a point makes of the recipe, and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nafnet_core import InputError
from pipelines.config.recipe import load_config, load_search
from pipelines.tune.space import Space, short
from tests.pipelines.tune import searches


def _space(tmp_path: Path, space: dict[str, Any], **search: Any) -> Space:
    return Space(searches.config(tmp_path, space=space, **search))


def test_values_are_drawn_as_the_recipe_says(tmp_path: Path) -> None:
    space = _space(
        tmp_path,
        {
            "optim.lr": {"loguniform": [1e-4, 1e-2]},
            "schedule.warmup_share": {"uniform": [0.0, 0.1]},
            "model.width": {"integers": [4, 6]},
            "stages.0.batch": {"choice": [4, 8]},
        },
    )
    rng = np.random.default_rng(0)
    points = [space.draw(rng) for _ in range(2000)]
    rates = np.log10([point["optim.lr"] for point in points])
    assert -4 <= rates.min() < -3.9 and -2.1 < rates.max() <= -2
    assert np.mean(rates < -3) == pytest.approx(0.5, abs=0.05)  # as many in each decade
    assert {point["model.width"] for point in points} == {4, 5, 6}
    assert np.mean([point["stages.0.batch"] == 4 for point in points]) == pytest.approx(0.5, abs=0.05)
    shares = [point["schedule.warmup_share"] for point in points]
    assert 0 <= min(shares) and max(shares) <= 0.1
    assert np.mean(shares) == pytest.approx(0.05, abs=0.003)


def test_a_point_is_put_into_the_recipe(tmp_path: Path) -> None:
    step = {"kind": "step", "milestones": [0.5], "decay": 0.5}
    space = _space(
        tmp_path,
        {
            # What is inside a section comes after the section, in whatever order they are given.
            "schedule.decay": {"uniform": [0.1, 0.9]},
            "schedule": {"choice": [{"kind": "cosine"}, step]},
            "stages.0.patch_px": {"choice": [16, 32]},
            "loss": {"choice": [{"l1": 1.0}, {"psnr": 1.0}]},
        },
    )
    recipe = space.recipe(
        {"schedule": step, "schedule.decay": 0.25, "stages.0.patch_px": 32, "loss": {"psnr": 1.0}}, name="x"
    )
    assert (recipe.name, recipe.schedule.kind, recipe.schedule.decay) == ("x", "step", 0.25)
    assert recipe.schedule.milestones == (0.5,)
    assert recipe.stages[0].patch_px == 32
    assert recipe.stages[0].batch == 8  # the recipe's
    assert dict(recipe.loss) == {"psnr": 1.0}


def test_nested_names_are_the_same_as_dotted_ones(tmp_path: Path) -> None:
    nested = searches.config(tmp_path, space={"optim": {"lr": {"uniform": [1e-3, 2e-3]}}})
    assert list(nested.search.space) == ["optim.lr"]


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    space = _space(
        tmp_path,
        {
            "optim.lr": {"loguniform": [1e-4, 1e-1]},
            "model.width": {"integers": [4, 6]},
            "optim.ema_decay": {"choice": [0.9, None]},
        },
        grid_points=4,
        searcher="grid",
        trials=100,
    )
    grid = space.grid()
    assert len(grid) == 4 * 3 * 2 == len({str(point) for point in grid})
    assert sorted({round(np.log10(point["optim.lr"])) for point in grid}) == [-4, -3, -2, -1]
    config = searches.config(tmp_path, space=searches.SPACE, grid_points=4, searcher="grid", trials=100)
    assert config.search.num_trials == 8  # no more than there are points


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ({"optim.rate": {"choice": [1]}}, "did you mean 'optim.clip_norm'|unknown key 'optim.rate'"),
        ({"seed": {"choice": [1, 2]}}, "decides the order of samples"),
        ({"budget.samples": {"choice": [1, 2]}}, "other lengths cannot be compared"),
        ({"data.val": {"choice": ["a"]}}, "scored on other data cannot be compared"),
        ({"data": {"choice": [{"train": [{"path": "a"}]}]}}, "other data cannot be compared"),
        ({"validation": {"choice": [{"times": 1}]}}, "scored otherwise cannot be compared"),
        ({"scaling.num_workers": {"choice": [1, 2]}}, "changes no result"),
        ({"optim.lr": {"uniform": [-1.0, 1.0]}}, "optim.lr.*greater than 0"),
        ({"stages.0.patch_px": {"choice": [16, 17]}}, "does not fit the network"),
        ({"stages.1.patch_px": {"choice": [16]}}, "no such place in a recipe.*stages.1.patch_px"),
        ({"schedule.kind": {"choice": ["cosine", "step"]}}, "needs one of milestones.*schedule.kind=step"),
        ({"loss.l3": {"choice": [1.0]}}, "loss"),
        (
            {"optim.lr": {"uniform": [1e-6, 1e-3]}, "schedule.final_lr": {"uniform": [1e-7, 1e-5]}},
            "final_lr must not exceed optim.lr.*optim.lr=1e-06, schedule.final_lr=1e-05",
        ),
    ],
)
def test_what_could_not_be_trained_is_refused_before_any_trial(
    tmp_path: Path, space: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=f"(?is){line}"):
        _space(tmp_path, space).check()


def test_of_too_many_combinations_every_pair_is_tried(tmp_path: Path) -> None:
    wide = {f"optim.{name}": {"uniform": [0.1, 0.2]} for name in ("lr", "weight_decay", "ema_decay")}
    wide |= {f"schedule.{name}": {"uniform": [0.1, 0.2]} for name in ("decay", "warmup_share")}
    wide |= {"data.cutblur": {"uniform": [0.0, 1.0]}, "data.channel_shuffle": {"uniform": [0.0, 1.0]}}
    wide |= {"model.width": {"integers": [4, 8]}, "optim.clip_norm": {"uniform": [0.1, 1.0]}}
    _space(tmp_path, wide).check()  # 512 combinations: all of them
    wide["schedule.final_lr"] = {"uniform": [1e-7, 0.15]}  # above the least lr
    with pytest.raises(InputError, match=r"final_lr must not exceed"):
        _space(tmp_path, wide).check()


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ({"space": {}}, "search.space.*one or more"),
        ({"space": {"optim.lr": 1e-3}}, "optim.lr says how it is drawn"),
        ({"space": {"optim.lr": {"uniform": [2, 1]}}}, "from less to more"),
        ({"space": {"optim.lr": {"loguniform": [0, 1]}}}, "loguniform above 0"),
        ({"space": {"optim.lr": {"uniform": [1, 2], "choice": [1]}}}, "exactly one of"),
        ({"trails": 4}, "did you mean 'search.trials'"),
        ({"scheduler": "pbt"}, "'asha', 'median' or 'none'"),
    ],
)
def test_a_bad_search_section_is_one_line(tmp_path: Path, search: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=f"(?is){line}"):
        searches.config(tmp_path, **search)


def test_minutes_are_no_budget_of_a_search(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples or epochs"):
        searches.config(tmp_path, {"budget": {"minutes": 1}})


def test_a_search_is_no_run_and_a_run_no_search(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nafnet tune"):
        load_config(searches.recipe(tmp_path / "search.yaml"))
    with pytest.raises(InputError, match="nothing to search"):
        load_search("mobile")


def test_a_point_is_told_in_few_characters() -> None:
    point = {
        "schedule": {"kind": "step", "milestones": [0.5, 0.75], "decay": 0.3},
        "optim.lr": 0.00123456,
        "a.lr": 1.0,
        "stages.0": 3,
    }
    assert short(point) == {
        "schedule": "step [0.5, 0.75] 0.3",
        "lr": "0.00123",
        "a.lr": "1",
        "stages.0": "3",
    }
