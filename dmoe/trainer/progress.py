"""How far a run is: the part of a checkpoint that counts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counters of a run; equal on every rank."""

    step: int = 0
    """Steps done, skipped ones too."""
    tokens: int = 0
    """Tokens seen, those of skipped steps too, without padding."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    eval_loss: float | None = None
    """Held-out loss in nats a token, where it was measured at this very step."""

    @property
    def optimizer_steps(self) -> int:
        """Updates made: what the learning rate is a function of."""
        return self.step - self.skipped

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Progress":
        """Take back what `state` returned."""
        return cls(**state)
