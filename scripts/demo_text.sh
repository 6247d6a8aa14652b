#!/bin/bash
# Writes a long public-domain text, one paragraph per chapter and without verse numbers: a range of the King James Bible,
# from Debian's package bible-kjv.
#   scripts/demo_text.sh OUT RANGE      e.g. gen1:1-rev22:21, all of it
set -euo pipefail

out="$1"
range="$2"
mkdir -p "$(dirname "$out")"
# `-f` turns the pretty form off: one verse per line, "Ge1:1 In the beginning ...".
bible -f "$range" </dev/null |
  awk '{
    chapter = $1
    sub(/:.*/, "", chapter)
    sub(/^[^ ]+ +/, "")
    if (chapter != last) printf "%s%s", last == "" ? "" : "\n\n", $0
    else printf " %s", $0
    last = chapter
  }
  END { print "" }' >"$out.part"
mv "$out.part" "$out"
