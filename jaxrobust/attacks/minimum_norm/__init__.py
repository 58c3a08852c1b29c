"""Attacks that find the nearest adversarial example instead of staying in a ball: DDN, FMN."""
