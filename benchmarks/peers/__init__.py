"""Adapters for the measured implementations, one file per library."""

from benchmarks.peers.ours import OURS
from benchmarks.peers.peer import Adapter, Peer
from benchmarks.peers.plain import REFERENCE
from benchmarks.peers.registry import PEERS

__all__ = ["OURS", "PEERS", "REFERENCE", "Adapter", "Peer"]
