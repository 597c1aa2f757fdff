"""The loops of a library by Apache TVM, chosen among candidates that are measured on this machine.

MetaSchedule (Shao et al., 2022, arXiv:2205.13603) draws them, and makes the next ones of the best so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Step = Callable[[int, int], None]
"""Told how many candidates are measured, of how many."""

_PER_ROUND = 8
_SEARCH = {"population_size": 128, "genetic_num_iters": 2, "init_min_unmeasured": 16}
"""A quarter of MetaSchedule's own, whose search takes longer here than to measure what it finds."""
_MEASURED_MS = 20
_SEED = 1


def tuned(module: Any, target: Any, *, num_trials: int, on_trial: Step) -> Any:
    """The best candidates found for a module's loops: a `Database` to compile them with.

    Args:
        module: a Relax module whose operators are loops already.
        target: this machine, with `num-cores`.
        num_trials: candidates for each loop, on average; slow and frequent ones get more, once all had some.
        on_trial: told of progress.
    """
    from tvm.s_tir import meta_schedule as ms

    # For a process of its own, to which it goes with all it is, for a function that could be imported there
    # would bring torch along. MetaSchedule's own reads the instructions of all processors first, for half a
    # minute.
    def built(module: Any, target: Any, _params: Any) -> Any:
        from tvm.driver import build
        from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

        return build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)

    # Not those of the target: with instructions for neural networks they are of integers, which are not here.
    space = ms.space_generator.PostOrderApply(
        sch_rules=ms.schedule_rule.ScheduleRule.create("llvm"),
        postprocs=ms.postproc.Postproc.create("llvm"),
        mutator_probs=ms.mutator.Mutator.create("llvm"),
    )
    loops = ms.relax_integration.extract_tasks(module, target, {})
    contexts = [
        ms.TuneContext(
            mod=loop.dispatched[0],
            target=target,
            space_generator=space,
            search_strategy=ms.search_strategy.EvolutionarySearch(**_SEARCH),
            task_name=loop.task_name,
            rand_state=_SEED + number,
        ).clone()
        for number, loop in enumerate(loops)
    ]
    total = num_trials * len(contexts)
    database = ms.database.MemoryDatabase()
    try:
        ms.tune.tune_tasks(
            tasks=contexts,
            task_weights=[loop.weight for loop in loops],
            work_dir="",
            max_trials_global=total,
            num_trials_per_iter=min(num_trials, _PER_ROUND),
            builder=ms.builder.LocalBuilder(f_build=built),
            runner=_counting(on_trial, total),
            cost_model="random",  # XGBoost's, a package more, found nothing faster in as many trials
            database=database,
        )
    except RuntimeError as error:
        if str(error).strip():
            raise
        raise KeyboardInterrupt from error  # on its way through TVM it has become an error without words
    on_trial(total, total)  # a loop of few forms has fewer candidates than were asked for
    return database


def _counting(on_trial: Step, total: int) -> Any:
    """Runs candidates, and tells of them at once: MetaSchedule hears of a round when the next begins."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.runner import EvaluatorConfig, LocalRunner, PyRunner

    @derived_object
    class Counting(PyRunner):
        """A local runner that counts."""

        def __init__(self) -> None:
            config = EvaluatorConfig(number=1, repeat=1, min_repeat_ms=_MEASURED_MS)
            self.local = LocalRunner(evaluator_config=config)
            self.num_measured = 0

        def run(self, candidates: Any) -> Any:
            measured = self.local.run(candidates)
            self.num_measured += len(candidates)
            on_trial(min(self.num_measured, total), total)
            return measured

    return Counting()
