# Runs the Python tests on every JAX that storax supports: each has an interpreter and a virtual
# environment of its own, by requirements/constraints.txt. Called by `make test-all`.
set -u

find_python() { # Prints an interpreter of this version, from PATH or from pyenv.
  for candidate in "python$1" "$HOME"/.pyenv/versions/"$1"*/bin/"python$1"; do
    found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
    if [ "$found" = "$1" ]; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

summary=""
passed=0
failed=0
for pair in 3.11:0.10 3.12:0.11 3.13:0.12; do
  version=${pair%:*}
  jax=${pair#*:}
  if ! python=$(find_python "$version"); then
    summary="$summary
  JAX $jax: not run, as there is no python$version in PATH or in ~/.pyenv/versions"
    continue
  fi
  echo "=== JAX $jax, $python ==="
  if "${MAKE:-make}" --no-print-directory test-python test-jit \
      PYTHON="$python" VENV=".venv-jax$(echo "$jax" | tr -d .)"; then
    passed=$((passed + 1))
    summary="$summary
  JAX $jax: passed"
  else
    failed=$((failed + 1))
    summary="$summary
  JAX $jax: FAILED"
  fi
done

echo "=== Summary ===$summary"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
