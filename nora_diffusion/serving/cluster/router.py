"""The router of Ray Serve for pictures of subjects. Imports Ray; Ray Serve is told its name."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from .routing import ranked


class SubjectRouter(RequestRouter):
    """A picture goes where its subject is loaded, or will be; one without a subject to the least busy replica."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The replicas in the order in which they are tried until one has room; each inner list by its load."""
        if pending_request is None or not (subject := pending_request.metadata.multiplexed_model_id):
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # while all are full
        found = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(own.replica_id) or 0 for name, own in found.items()}
        return [[found[name]] for name in ranked(subject, loads)]
