"""Dynamic loss scaling for float16: keeps gradients in its range; an overflow is a skip."""


class LossScale:
    """The factor on the loss; 1 for every other precision."""

    def __init__(self, *, enabled: bool, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0

    def step_taken(self) -> None:
        """Double the scale after enough good steps in a row."""
        if not self.enabled:
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2
            self.good_steps = 0

    def step_skipped(self) -> None:
        """Halve the scale: the gradients overflowed."""
        if self.enabled:
            self.value = max(1.0, self.value / 2)
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        if not self.enabled:
            return {}
        return {"loss_scale": self.value, "loss_scale_good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Take back what `state` returned, if both then and now the precision scales at all."""
        if self.enabled and "loss_scale" in state:
            self.value = state["loss_scale"]
            self.good_steps = int(state["loss_scale_good_steps"])
