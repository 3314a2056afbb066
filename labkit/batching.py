"""Static, dynamic and continuous batching: the topic's names in one place, and attention over a ragged batch."""

from labkit.scheduler import POLICIES, Batch, Request, Scheduler  # noqa: F401
from labkit.simulate import (  # noqa: F401
    TOY,
    LinearCost,
    RooflineCost,
    Trace,
    anyscale,
    capped_exponential,
    fit_cost,
    long_prompts,
    orca,
    simulate,
)
