"""All measured implementations, in the order of the report's columns and colours."""

from benchmarks.peers import (
    cut_cross_entropy,
    liger,
    ours,
    plain,
    quack,
    torch_linear_cross_entropy,
    trl,
)
from benchmarks.peers.peer import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *ours.PEERS,
        *plain.PEERS,
        trl.PEER,
        liger.PEER,
        torch_linear_cross_entropy.PEER,
        cut_cross_entropy.PEER,
        quack.PEER,
    )
}
