"""HTML from text that anyone may have written."""

import json

from absl.testing import absltest

from jaxrobust.report.drawing import markup


class MarkupTest(absltest.TestCase):
    def test_text_and_attributes_are_escaped(self):
        given = '<b>"it\'s" & more'
        made = markup.tag("p", given, markup.Html("<i>kept</i>"), None, title=given, hidden=True)
        escaped = "&lt;b&gt;&quot;it&#x27;s&quot; &amp; more"
        self.assertEqual(made, f'<p title="{escaped}" hidden>{escaped}<i>kept</i></p>')
        self.assertEqual(markup.tag("br", class_=None), "<br/>")

    def test_data_cannot_end_its_element(self):
        value = {"name": "</script><script>alert(1)</script>\u2028", "few": float("nan")}
        made = markup.data('a"b', value)
        self.assertStartsWith(made, '<script type="application/json" id="a&quot;b">')
        inside = made.removesuffix("</script>").partition(">")[2]
        self.assertNotRegex(inside, "[<>&\u2028]")
        self.assertEqual(json.loads(inside), {"name": value["name"], "few": None})

    def test_a_text_to_copy_has_a_button(self):
        made = markup.copied("The <title>", "a & b")
        button = '<button type="button" class="copy">Copy</button>'
        inside = f'<summary>The &lt;title&gt;</summary>{button}<pre tabindex="0">a &amp; b</pre>'
        self.assertEqual(made, f'<details class="copyonly">{inside}</details>')


if __name__ == "__main__":
    absltest.main()
