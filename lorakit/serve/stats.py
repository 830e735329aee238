"""What an engine does and has done."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """running: requests in the engine now, waiting ones with them; finished, failed, cancelled and tokens: since the start.

    steps: forward passes of the continuous batch; requests_in_batch, adapters_in_batch: of the last one.
    """

    running: int
    finished: int
    failed: int
    cancelled: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    requests_in_batch: int
    adapters_in_batch: int
