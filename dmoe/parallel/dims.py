"""The layout of the ranks: world = edp x ep, expert parallel innermost.

One object, built once and passed to whatever needs a group; there is no global mesh. Rank r is
expert-parallel rank r % ep and expert-data-parallel rank r // ep. Dense parameters span all ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch.distributed.device_mesh import DeviceMesh

from dmoe.config.base import ConfigError, ConfigModel


class ParallelConfig(ConfigModel):
    """How the ranks are laid out."""

    ep: PositiveInt = 1
    """Expert-parallel degree: ranks among which the experts of a layer are divided."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes, this rank's coordinates, and the groups and meshes; a group of one rank is None."""

    world_size: int = 1
    rank: int = 0
    ep: int = 1
    world_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    """The ranks that together hold all experts; tokens are exchanged within it."""
    edp_group: dist.ProcessGroup | None = None
    """The ranks that hold the same experts; expert gradients are summed over it."""
    dense_mesh: DeviceMesh | None = None
    """All ranks in one axis, "dp"."""
    expert_mesh: DeviceMesh | None = None
    """Axes ("ep", "edp"): sharding dim 0 over both, in this order, gives each rank its experts."""

    @classmethod
    def create(cls, *, ep: int = 1, device_type: str = "cpu") -> "ParallelDims":
        """Lay out the default process group, or one process where there is none.

        Raises:
            ConfigError: `ep` does not divide the number of ranks.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size % ep:
            raise ConfigError(
                f"parallel.ep = {ep} does not divide the number of ranks, {world_size}: change "
                f"parallel.ep or the number of processes (torchrun --nnodes, --nproc-per-node)",
                key="parallel.ep",
            )
        if world_size == 1:
            return cls()
        ranks = torch.arange(world_size)
        dense_mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("dp",))
        expert_mesh = DeviceMesh(device_type, ranks.view(-1, ep).T, mesh_dim_names=("ep", "edp"))
        return cls(
            world_size=world_size,
            rank=dist.get_rank(),
            ep=ep,
            world_group=dense_mesh.get_group(),
            ep_group=expert_mesh.get_group("ep") if ep > 1 else None,
            edp_group=expert_mesh.get_group("edp") if ep < world_size else None,
            dense_mesh=dense_mesh,
            expert_mesh=expert_mesh,
        )

    @property
    def edp(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world_size // self.ep

    @property
    def ep_rank(self) -> int:
        """This rank's place among the ranks that divide the experts."""
        return self.rank % self.ep

    @property
    def edp_rank(self) -> int:
        """This rank's place among the ranks that hold the same experts."""
        return self.rank // self.ep

    def local_experts(self, num_experts: int) -> range:
        """Return the global ids of this rank's experts, of `num_experts` in a layer."""
        assert num_experts % self.ep == 0, f"{num_experts} experts over ep = {self.ep}"
        num_local = num_experts // self.ep
        return range(self.ep_rank * num_local, (self.ep_rank + 1) * num_local)

    def describe(self, num_experts: int) -> str:
        """Say the layout in one line, as printed at start."""
        layout = f"world {self.world_size} = edp {self.edp} x ep {self.ep}"
        dense = f"dense over {self.world_size}"
        if not num_experts:
            return f"{layout} | {dense} | no experts"
        return f"{layout} | {dense} | {num_experts} experts, {num_experts // self.ep} per rank"
