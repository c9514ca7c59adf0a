"""How a peer is to serve: read and written without torch."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from models.catalog import Catalog

VARIABLE = "BENCH_PEER"


@dataclass(frozen=True)
class Plan:
    """In one variable of the peer's environment."""

    models: list[str]
    cards: str | None = None  # a folder with more of them
    device: str = "cpu"
    dtype: str = "auto"  # the cards'
    threads: int = 0  # of torch; 0: its own choice
    batch: int = 8
    wait: float = 0.05  # seconds for a batch to fill
    net: bool = False  # with our nets in its handler
    port: int = 0

    @classmethod
    def read(cls) -> "Plan":
        return cls(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def catalog(self) -> Catalog:
        return Catalog.read(self.models, Path(self.cards) if self.cards else None)
