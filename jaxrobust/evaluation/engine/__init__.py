"""AutoAttack's engine: jobs in slots, attack after attack, verdict by verdict on disk."""
