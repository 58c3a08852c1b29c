"""Additions to the registries of the core: name -> "module:OBJECT"."""

# name -> module, usage, what it does: the fields of `jaxrobust.__main__.Command`
COMMANDS = {
    "figure": (
        "jaxrobust.papers.commands.figure",
        "A B --out F.pdf",
        "draws records as figures for papers",
    ),
    "scaling": (
        "jaxrobust.papers.commands.scaling",
        "5e9",
        "chooses a network's depths and widths",
    ),
    "analyse": (
        "jaxrobust.papers.commands.analyse",
        "ANALYSIS --workdir RUN",
        "visualizes what a network has learned",
    ),
    "landscape": (
        "jaxrobust.papers.commands.landscape",
        "--workdir RUN",
        "draws the loss around the weights",
    ),
    "sparsity": (
        "jaxrobust.papers.commands.sparsity",
        "--workdir RUN",
        "draws the share of weights near zero",
    ),
    "plan": (
        "jaxrobust.papers.commands.plan",
        "PAPER --on v5e:8x8",
        "lists a paper's runs, costs and order",
    ),
    "reproduce": (
        "jaxrobust.papers.commands.reproduce",
        "RUN --paper P",
        "shows papers' tables next to our records",
    ),
}
# public name of `jaxrobust.evaluation`
PUBLIC_EVALUATION = {
    "WorstCaseResult": "jaxrobust.papers.worst_case:WorstCaseResult",
    "worst_case": "jaxrobust.papers.worst_case:worst_case",
}
# flag of `jaxrobust evaluate` that says which attacks in which balls -> module
EVALUATIONS = {"worst_case": "jaxrobust.papers.three_norms"}
# flag of `jaxrobust estimate` for other questions than the cost of a config -> module
ESTIMATES = {"target": "jaxrobust.papers.law"}
