"""Runs vLLM with LMCache's blend server, and checks both.

::

    commands   the command lines of both servers, with every flag and variable
    tiers      second tiers of LMCache, and their passwords
    lmcache_server    LMCache's command line, with those passwords filled in
    process    one server as a guarded process: none of its processes outlives us
    supervise  both together: order, health, restarts, signals
    machine    checks of this machine: GPU, versions, CUDA code, model
    doctor     every check in order, running servers and a round trip too
"""
