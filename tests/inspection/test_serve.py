"""The report's server: the report's own files, to this machine, under its own name."""

import http.client
from threading import Thread

import pytest
from typer.testing import CliRunner

from moefy.cli.verbs import app
from moefy.errors import OutputError
from moefy.inspection.report import server


@pytest.fixture
def folder(tmp_path):
    """A report beside and among files that are none of it."""
    found = tmp_path / "report"
    own = ("index.html", "index.json", "layer-0.json.gz", "texts/0.json.gz")
    strange = (".git/config", ".env", "texts/.hidden.gz", ".gz", "notes.txt", "model.safetensors",
               "page.html", "other.json", "records.json")  # fmt: skip
    for name in (*own, *strange, "../secret.gz", "../away/index.json"):
        file = found / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content of {name}")
    (found / "link.gz").symlink_to(tmp_path / "secret.gz")
    (found / "inner.gz").symlink_to(found / ".env")
    (found / "away").symlink_to(tmp_path / "away")
    (found / "loop.gz").symlink_to(found / "loop.gz")
    (found / "folder.gz").mkdir()
    return found


@pytest.fixture
def ask(folder):
    with server(folder) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        port = running.server_address[1]

        def get(path, *hosts, method="GET"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.putrequest(method, path, skip_host=True)
            for host in hosts or (f"127.0.0.1:{port}",):
                connection.putheader("Host", host)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

        yield get
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/", "/index.html", "/index.json?x=../y", "/texts/0.json.gz"])
def test_files_of_the_report_are_given(ask, path):
    status, content, headers = ask(path)
    name = path[1:].partition("?")[0] or "index.html"
    assert (status, content) == (200, f"content of {name}")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert ask(path, method="HEAD")[:2] == (200, "")


@pytest.mark.parametrize(
    "path",
    [
        "/.git/config", "/.env", "/texts/.hidden.gz", "/.gz", "/notes.txt", "/model.safetensors",
        "/page.html", "/other.json", "/records.json", "/link.gz", "/inner.gz", "/away/index.json",
        "/loop.gz", "/folder.gz", "/texts", "/texts/", "/../secret.gz", "/texts/../../secret.gz",
        "/%2e%2e/secret.gz", "/..%2fsecret.gz", "/..\\secret.gz", "/./index.html",
        "/texts//0.json.gz", "/index.html/", "/index.html%00.gz", "/absent.gz", "/" + "a" * 5000 + ".gz",
        "http://127.0.0.1/index.html", "*",
    ],
)  # fmt: skip
def test_nothing_else_is(ask, path):
    status, content, _ = ask(path)
    assert status == 404 and "content of" not in content


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1", "[::1]:80"])
def test_this_machine_has_these_names(ask, host):
    assert ask("/", host)[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [("evil.example",), ("evil.example:8000",), ("127.0.0.1.evil.example",), ("localhost.evil",),
     ("evil@127.0.0.1",), ("127.0.0.1", "evil.example"), ("",), ("0.0.0.0",), ("127.0.0.1:8000:1",)],
)  # fmt: skip
def test_another_name_for_this_machine_gets_nothing(ask, hosts):
    status, content, _ = ask("/", *hosts)
    assert status == 421 and "content of" not in content


def test_reading_is_all_there_is(ask):
    assert ask("/", method="POST")[0] == ask("/", method="DELETE")[0] == 501


@pytest.mark.parametrize("port", [-1, 65536, 10**30])
def test_a_port_out_of_range_is_one_line(folder, port):
    with pytest.raises(OutputError, match=f"port {port}: there is none; give one from"):
        server(folder, port)
    done = CliRunner().invoke(app, ["serve", str(folder), "--port", str(port)])
    assert done.exit_code == 1 and done.stderr.startswith(f"moefy: port {port}: "), done.output
