"""Networks with the usual faults, which `bench_doctor.py` shows to `python -m jaxrobust.doctor`."""
