"""``depthmix bench``: how fast the operations and a step are, beside what memory allows and what others do.

    case.py      what a case is; the registry
    cases.py     the operations
    steps.py     a training step, a generated token
    floor.py     bytes that must move, in D elements per token
    peers.py     other packages' implementations of the same equations
    runner.py    checks a candidate, then times it in turns with the others
    machine.py   what the figures depend on: device, versions, copy bandwidth, matrix peak
    report.py    tables; plots from the JSON alone
    command.py   the verb

A speed is never printed for a result that is wrong: every candidate's outputs and gradients are compared with a
float64 reference before it is timed (:mod:`depthmix.bench.runner`).
"""
