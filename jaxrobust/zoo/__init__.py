"""Networks of a study of architectures at 32 px, searched cells, and more objectives.

Source of the study: Tang et al. 2022, "Exploring the Relationship between Architecture and
Adversarially Robust Generalization" (arXiv 2209.14105). Its networks were never published. Their
public code was identified by counting parameters, and each file names it. Rows that end in _224 are
ours. Parity: tests/zoo, each network against golden logits of that code.
"""
