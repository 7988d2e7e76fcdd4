"""Fails when a JUnit report tells of a skipped test other than a GPU test: python .ci/skipped.py REPORT"""
import sys
import xml.etree.ElementTree as ET

bad = [f"{case.get('classname')}::{case.get('name')}: {skip.get('message')}" for case in ET.parse(sys.argv[1]).iter("testcase")
       for skip in case.iter("skipped") if not (skip.get("message") or "").startswith("GPU")]
print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
if bad: sys.exit(f"{len(bad)} skipped, and only GPU tests may be: install what they need.")
