"""Runs vLLM with LMCache's blend server, and checks what of the two works.

::

    commands   what to run, with every flag and variable
    tiers      second tiers of LMCache, and their passwords
    lmcache_server    LMCache's command line, with those passwords filled in
    process    one server as a process behind a guard: nothing of it outlives us
    supervise  both together: order, health, restarts, signals
    api        requests to a running vLLM or LMCache server
    machine    checks of this machine: GPU, versions, CUDA code, model
    doctor     every check in order, running servers and a round trip too
"""
