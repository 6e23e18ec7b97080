//! System tests of the pyrite executable. The tests are in `tests/`; this library is their harness.
