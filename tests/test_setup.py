"""What a run says of its preparation."""

from __future__ import annotations

import time

from trainer.setup import with_rate


class Said:
    """Keeps what a recorder is told."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def phase(self, name: str, done: int = 0, of: int = 0, detail: str = "") -> None:
        self.details.append(detail)


def test_the_rate_counts_only_what_this_run_encoded() -> None:
    said = Said()
    tell = with_rate(said, "caching latents")  # type: ignore[arg-type]
    tell(100, 200)  # were there already
    time.sleep(0.2)
    tell(110, 200)
    assert said.details[0] == ""
    words, rate = said.details[1].split(", ")
    assert words == "110 of 200" and 5 < float(rate.removesuffix(" images/s")) <= 50
