"""A machine that is told what a network returned."""


def told(machine, state, outputs, gradient=None):
    score = None if machine.score is None else machine.score(state, outputs)
    return machine.tell(state, machine.loss(state, outputs), score, gradient)
