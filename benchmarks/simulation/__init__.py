"""A discrete-event simulation of many clients and replicas, in which the client's own scheduling code runs.

`sidelight._streaming.scheduling` decides as in a real stream: which batches are read, which server gets each part, and
which parts are sent again. Only its clock is virtual, and servers, network and deaths are simulated. Results are
compared with an ideal queue: one queue in front of all servers that knows their state without delay.

    python -m benchmarks.simulation
"""
