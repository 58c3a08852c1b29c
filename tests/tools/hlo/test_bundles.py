"""Cycles and units from the compiler's final bundles."""

import tempfile
from pathlib import Path

from absl.testing import absltest

from jaxrobust.doctor.programs import hlo
from jaxrobust.runtime.devices import hardware
from tools.hlo import bundles

# Four stages of a pipeline, of which the middle ones have six turns of a loop each, and clear sums
# in the first. Nobody knows how often the last branch is taken.
LINES = """
= control target key start
LH: loop header

     0   :  { %s1_s0 = smov 0 /* copy */  ;;  %s2_s1 = smov 2 }
   0x1 LB: > { %s3_s0 = sphi %s1_s0, %s8_s0 } /* Start region 8 */
   0x2   : > { %p1_p0 = scmp.ge.s32.totalorder %s3_s0, 1  ;;  %s9_s2 = sadd.s32 4294967295, %s3_s0 }
   0x3   : > { %p2_p1 = scmp.lt.s32.totalorder %s3_s0, 3 }
   0x4   : > { %p3_p2 = pnand %p1_p0, %p2_p1  ;;  %p9_p2 = scmp.ne.s32.totalorder %s9_s2, 0 }
   0x5   : > { %20 = sbr.rel (%p3_p2) target = $region5 }
   0x6   : > { %21 = sbr.rel (%p9_p2) target = $region6 }
   0x7 PB: > { %22 = vst [vmem:[%s7_s7]] 0 }
   0x8 LB: >> { %s5_s1 = sphi %s2_s1, %s6_s1 } /* Start/End empty region 6 :: Start region 7 */
   0x9   : >> { %s6_s1 = sadd.s32 (%p2_p1), 2, %s5_s1 }
   0xa   : >> { %p4_p3 = scmp.ge.s32.totalorder (%p2_p1), %s6_s1, 14 /* loop exit test */ }
   0xb   : >> { %23 = sbr.rel (!%p4_p3) target = $region7 }
   0xc   :  {} /* End region 7 */
   0xd PF: > { %s4_s0 = sadd.s32 1, %s3_s0 } /* Start/End empty region 5 */
   0xe   : > { %p5_p4 = scmp.ge.s32.totalorder %s4_s0, 4  ;;  %s8_s0 = smov %s4_s0 /* copy */ }
   0xf   :  { %24 = sbr.rel (!%p5_p4) target = $region8 }
  0x10   :  {} /* End region 8 */
  0x11   :  { %25 = sbr.rel (%p7_p5) target = $region9 }
  0x12   :  { %26 = vst [vmem:[%s7_s7]] 0 }
  0x13   :  {} /* Start/End empty region 9 */
"""
# 4 turns of 9 bundles, 2 of the branch at 0x6, 1 of 0x7, 2 x 6 of 5, and 4 without a loop.
CYCLES = 4 * 9 + 2 + 1 + 2 * 6 * 5 + 4
PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[8])->f32[8]}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion.2 = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"50"}
  %fusion.4 = f32[8]{0} negate(%fusion.2), backend_config={"estimated_cycles":"50"}
  %copy-start.5 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%fusion.4)
  ROOT %copy.3 = f32[8]{0} negate(%fusion.4), backend_config={"estimated_cycles":"9"}
}
"""


def utilization(rows=20):
    """Both of a unit's slots in the inner loop, and one of another in every bundle."""
    inner = [f"{2 * (8 <= row <= 12)} 1 1" for row in range(rows)]
    return "\n".join(["== CAPACITY:", "MXU, VLOAD, VLOAD:FILL", "2 4 4", "== USED:", *inner])


class BundlesTest(absltest.TestCase):
    def test_turns(self):
        read = bundles.schedule(LINES, utilization())
        self.assertEqual(read.cycles, CYCLES)
        self.assertAlmostEqual(read.units.pop("MXU"), 2 * 6 * 5 / CYCLES)
        self.assertEqual(read.units, {"VLOAD": 0.25})

    def test_files_of_different_bundles(self):
        with self.assertRaisesRegex(ValueError, "zip"):
            bundles.schedule(LINES, utilization(19))

    def test_heaviest_works(self):
        folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        module = hlo.parse(PROGRAM)

        def write(time):
            for number, kind, text in (
                (0, "hlo-static-per-bundle-utilization", utilization()),
                (2, "bundles", LINES),
            ):
                (folder / f"{time}-fusion.2-{number:02}-final_{kind}.txt").write_text(text)

        write(17)
        (folder / "17-copy.3-02-final_bundles.txt").write_text("nothing is beside it")
        for kind in ("bundles", "hlo-"):  # of the program around the works
            (folder / f"17-TLP-02-final_{kind}.txt").write_text("unread")
        read = bundles.read(module, folder)
        row, alike = read["schedules"]
        self.assertEqual((row["work"], row["runs"]), ("fusion.2", 1))
        self.assertEqual((row["estimate"], row["bundles"]), (50, CYCLES))
        # The compiler writes works that are alike only once.
        self.assertEqual((alike["work"], alike["bundles"]), ("fusion.4", CYCLES))
        # Bytes of an asynchronous copy wait for nothing.
        read_work, start = (CYCLES, 64, True), (0, 0, False)
        self.assertEqual(read["scheduled_costs"], [read_work, read_work, start, (9, 64, False)])
        chip = hardware.Chip(flops=1e9, memory=1, bandwidth=1e9, interconnect=1, clock=1e9)
        sums = bundles.total(read | {"hbm_bytes": 257}, chip, 29)
        seconds = 2e-9 * CYCLES + 64e-9
        self.assertAlmostEqual(sums["scheduled_s"], seconds, delta=1e-15)
        self.assertAlmostEqual(sums["peak_share"], 29e-9 / seconds)
        self.assertAlmostEqual(sums["cycles_alone_s"], 2e-9 * CYCLES + 9e-9, delta=1e-15)
        self.assertAlmostEqual(sums["scheduled_share"], 2 * CYCLES / (2 * CYCLES + 9))
        self.assertEqual(bundles.total(read | {"hbm_bytes": 1e6}, chip, 29)["scheduled_s"], 1e-3)
        self.assertEqual(bundles.total(read, chip._replace(clock=None), 29), {})
        _, line, last = bundles.lines([row], sums)
        self.assertRegex(line, r"0 +0  MXU +58\.3%  other, .*\(fusion\.2, 1 runs\)")
        self.assertRegex(
            last, r"^by the schedule, not measured: 0\.0 ms, .*9[0-9.]+% of the cycles"
        )
        # Files are of one program.
        with self.assertRaisesRegex(ValueError, "the compiler wrote no schedule of this program"):
            bundles.read(module, folder)


if __name__ == "__main__":
    absltest.main()
