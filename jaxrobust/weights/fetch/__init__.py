"""Sources of weights, parsed and brought here: files, addresses, hubs."""

KINDS = (  # of sources, as help and messages say them
    "a file, an imported folder, the workdir of a run, https://..., "
    "hf://ORG/REPO[@REVISION][/FILE], a RobustBench id such as Salman2020Do_R18, a timm id such as "
    "convnext_tiny.fb_in1k, or quickstart, which ships with the package"
)
