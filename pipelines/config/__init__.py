"""Run configuration: typed, frozen, unknown keys refused with the nearest valid one.

    config = load_config("mobile", overrides=["optim.lr=5e-4", "budget.minutes=10"])

Precedence: defaults < recipe file < overrides. A recipe is a YAML file, or the name of a shipped one.
"""

from pipelines.config.base import Section
from pipelines.config.data import BlurSection, DataSection, StoreSection
from pipelines.config.recipe import find_recipe, load_config, load_search, parse_config, with_stores
from pipelines.config.search import Distribution, SearchConfig, SearchSection
from pipelines.config.sections import (
    BudgetSection,
    LossName,
    ModelSection,
    RunConfig,
    StageSection,
)

__all__ = [
    "BlurSection",
    "BudgetSection",
    "DataSection",
    "Distribution",
    "LossName",
    "ModelSection",
    "RunConfig",
    "SearchConfig",
    "SearchSection",
    "Section",
    "StageSection",
    "StoreSection",
    "find_recipe",
    "load_config",
    "load_search",
    "parse_config",
    "with_stores",
]
