"""Networks with common faults, on which `bench_doctor.py` tests `python -m jaxrobust.doctor`."""
