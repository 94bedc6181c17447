"""The findings of `xushi doctor`."""

from xushi.base import doctor, machine


def test_doctor_report():
    findings = {finding.name: finding for finding in doctor.doctor_report("C++")}
    assert next(iter(findings)) == "system" and findings["torch"].verdict == "ok"
    assert float(findings["matrix product fp32"].value.split()[0]) > 1
    assert ("matrix product bf16" in findings) == (findings["training dtype"].value == "bf16")
    assert all(value and verdict for _, value, verdict in findings.values())


def test_doctor_names_an_old_torch(monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    monkeypatch.setattr(doctor, "measure_matrix_gflops", lambda name: 1.0)
    assert doctor._torch_findings("fp32")[0].verdict == "install torch 99.0 or newer"


def test_doctor_where_the_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(machine, "_lines", lambda path: [])
    monkeypatch.setattr(machine, "_sysctl", lambda name: "")
    monkeypatch.setattr(doctor, "_torch_findings", lambda dtype: [])
    assert doctor.doctor_report("C++")[2].value == "unknown"
