"""Whose job is next."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import claim, submit


def tenants_served(registry: JobRegistry, number: int, finish: bool) -> list[str]:
    served = []
    for _ in range(number):
        claimed = claim(registry)
        served.append(claimed.job.tenant)
        if finish:
            registry.succeed(claimed.attempt, {})
    return served


def test_a_tenant_with_one_job_does_not_wait_for_a_tenant_with_many(registry: JobRegistry) -> None:
    for _ in range(6):
        submit(registry, tenant="many")
    assert tenants_served(registry, 2, finish=True) == ["many", "many"]
    submit(registry, tenant="one")
    assert tenants_served(registry, 2, finish=True) == ["one", "many"]


def test_slots_are_shared_evenly(registry: JobRegistry) -> None:
    for tenant in ("a", "b", "c"):
        for _ in range(6):
            submit(registry, tenant=tenant)
    served = tenants_served(registry, 9, finish=False)
    assert sorted(served) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    # Each round serves each.
    assert all(len(set(served[start : start + 3])) == 3 for start in (0, 3, 6))


def test_who_has_more_running_waits(registry: JobRegistry) -> None:
    for _ in range(3):
        submit(registry, tenant="long")
    running = [claim(registry) for _ in range(2)]
    for _ in range(3):
        submit(registry, tenant="short")
    # Whatever its turn, a tenant with two running jobs lets the other have two.
    assert tenants_served(registry, 2, finish=False) == ["short", "short"]
    for claimed in running:
        registry.succeed(claimed.attempt, {})
    assert claim(registry).job.tenant == "long"


def test_priority_goes_before_shares(registry: JobRegistry) -> None:
    for _ in range(2):
        submit(registry, tenant="a", priority=1)
    submit(registry, tenant="b")
    assert tenants_served(registry, 3, finish=False) == ["a", "a", "b"]


def test_queues_have_turns_of_their_own(registry: JobRegistry) -> None:
    for tenant in ("a", "b"):
        for queue in ("cpu", "gpu"):
            submit(registry, tenant=tenant, queue=queue)
            submit(registry, tenant=tenant, queue=queue)
    first = [claim(registry, queue).job.tenant for queue in ("cpu", "gpu")]
    second = [claim(registry, queue).job.tenant for queue in ("cpu", "gpu")]
    assert first == ["a", "a"]
    assert second == ["b", "b"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2)), min_size=1, max_size=12))
def test_every_job_is_claimed_once_and_by_the_rules(registry: JobRegistry, jobs: list[tuple[str, int]]) -> None:
    waiting = {submit(registry, tenant=tenant, priority=priority).id: (tenant, priority) for tenant, priority in jobs}
    order = list(waiting)
    while waiting:
        claimed = claim(registry)
        tenant, priority = waiting.pop(claimed.job.id)
        assert priority == max([priority, *(other for _, other in waiting.values())])
        # Of the same tenant and priority, the oldest.
        equals = [job for job, found in waiting.items() if found == (tenant, priority)]
        assert all(order.index(claimed.job.id) < order.index(job) for job in equals)
        registry.succeed(claimed.attempt, {})
        assert registry.get(claimed.job.id).state is JobState.SUCCEEDED
    assert registry.claim_next("cpu", "w", 10) is None
