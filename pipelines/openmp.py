"""How long OpenMP's threads, by which torch computes on a CPU, spin before they sleep while they wait.

Awake they lose no time, and asleep no core. Where another program wants the cores, those that spin hold up
the one that all wait for. `nafnet restore` of 50 photos of 481×321 on two cores, alone and beside one busy
process: 10 to 13 s and 11 to 12 s where they sleep at once, 8 to 10 s and 14 to 15 s with 2,000 rounds of
GNU's OpenMP, 8 s and 25 s with 10,000. With its own 300,000 a large photo takes twenty times as long beside
another program.
"""

from __future__ import annotations

import os

_SPIN_BRIEFLY = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}


def spin_briefly() -> None:
    """Say so to this process and those it starts, before torch is there, unless the user said anything."""
    os.environ.update(spinning())


def spinning() -> dict[str, str]:
    """Variables of the environment that say so: the user's own, if there are some."""
    given = {name: os.environ[name] for name in _SPIN_BRIEFLY if name in os.environ}
    return given or dict(_SPIN_BRIEFLY)
