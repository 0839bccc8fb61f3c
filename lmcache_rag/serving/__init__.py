"""Runs vLLM with an LMCache blend server beside it, and says what of the two works.

::

    commands   what to run, with every flag
    child      a guard around one server: nothing of it outlives us
    server     one server as a process: start, log, stop
    supervise  both together: order, health, restarts, signals
    api        what is asked of a running vLLM server
    roundtrip  chunks precomputed, then asked in another order
    environment    whether what is installed here can serve and blend
    checks, live_checks, doctor    the checks of this machine and of running servers
"""
