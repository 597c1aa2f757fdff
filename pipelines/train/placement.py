"""The place that a run's workers have in the cluster, given back where its owner was killed.

Ray Train reserves it as a placement group. If the controller dies, a cleaner of Ray's is to remove the
group; it asks Ray's dashboard whether the controller lives, and does nothing where there is none (Ray 2.60),
as in a local instance, or in a cluster without `ray[default]`. The next attempt would wait for ever for room
that nobody uses.
"""

from __future__ import annotations

import logging

from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.train.files import GROUP

log = logging.getLogger(__name__)


def note_group(storage: LocalFolder | RemoteFolder) -> None:
    """Write down, in a worker, which group it is in."""
    from ray.util.placement_group import get_current_placement_group

    group = get_current_placement_group()
    if group is not None:
        storage.write(GROUP, group.id.hex().encode())


def release_group(storage: LocalFolder | RemoteFolder) -> None:
    """Give back what an earlier attempt has left behind, if anything."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if storage.size(GROUP) is None:
        return
    group = PlacementGroup(PlacementGroupID(bytes.fromhex(storage.read(GROUP).decode())))
    # Of another cluster, or another day, it is not there any more.
    if placement_group_table(group).get("state") in ("CREATED", "RESCHEDULING"):
        log.warning("the workers of an attempt that was killed had kept their place; it is given back")
        remove_placement_group(group)
