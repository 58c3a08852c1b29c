"""Compiled programs are kept on disk from test to test and from run to run.

Three quarters of a test's time are XLA's, and many tests compile the same program. Not in
`__init__.py`: processes that tests start must not have it (see `compilation.use_persistent_cache`).
"""

import jax

from jaxrobust.runtime.compilation import use_persistent_cache

use_persistent_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
