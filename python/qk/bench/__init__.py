"""`qk bench`: our kernels and networks beside those of other runtimes, on this machine.

problems (what) -> ours, elementwise, training, networks, peers (who) -> suite (rows) -> worker (measures) -> run
(starts workers) -> goals, page (docs/performance.md). Nothing outside this folder needs a peer.
"""
