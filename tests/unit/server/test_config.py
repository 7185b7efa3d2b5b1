"""Settings: flags, then variables, then the file, then defaults; errors name the field."""

import os
from pathlib import Path

import pytest
from sidelight_server.config.model_settings import ModelSettings
from sidelight_server.config.reading import FILE, PREFIX, misspelt_variables, read_settings
from sidelight_server.config.settings import Settings
from sidelight_server.errors import ConfigurationError


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and none of the variables."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def write_file(text: str) -> None:
    FILE.write_text(text)


def changed(settings: Settings) -> dict[str, object]:
    """Return the settings that differ from their defaults."""
    default = Settings()
    return {name: value for name, value in settings.model_dump().items() if value != getattr(default, name)}


def test_without_configuration_every_setting_has_its_default() -> None:
    assert read_settings([]) == Settings()


def test_every_setting_has_a_description_and_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(["--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert field.description
        assert f"--{name.replace('_', '-')} " in help_text


FLAGS = {
    "model": (["--model", "python:mine:net"], "python:mine:net"),
    "weights": (["--weights", "net.safetensors"], Path("net.safetensors")),
    "name": (["--name", "net"], "net"),
    "input_size": (["--input-size", "3,224,224"], (3, 224, 224)),
    "load": (["--load", "lazy"], "lazy"),
    "trial_size": (["--trial-size", "1,64,64"], (1, 64, 64)),
    "pixel_range": (["--pixel-range=-1024,1024"], (-1024.0, 1024.0)),
    "window": (["--window", "0,4095"], (0.0, 4095.0)),
    "input": (["--input", "pixel_values"], "pixel_values"),
    "arguments": (["--arguments", '{"return_dict": true}'], {"return_dict": True}),
    "layer_layout": (["--layer-layout", '{"blocks.10": "tokens:1:14x14"}'], {"blocks.10": "tokens:1:14x14"}),
    "method_precision": (["--method-precision", '{"smoothgrad": "bfloat16"}'], {"smoothgrad": "bfloat16"}),
    "fidelity": (["--fidelity", "0.99"], 0.99),
    "accept_partial_gradient": (["--accept-partial-gradient"], True),
    "label_argument": (["--label-argument", "disease"], "disease"),
    "output_key": (["--output-key", "y_prob"], "y_prob"),
    "max_model_in_flight": (["--max-model-in-flight", "3"], 3),
    "models": (["--models", '{"a": {"model": "hf:a"}}'], {"a": ModelSettings(model="hf:a").model_dump()}),
    "watch_s": (["--watch-s", "10"], 10.0),
    "allow_reload": (["--allow-reload"], True),
    "mean": (["--mean", "0.5,0.4,0.3"], (0.5, 0.4, 0.3)),
    "std": (["--std", "1"], (1.0,)),
    "resize": (["--resize", "256"], 256),
    "interpolation": (["--interpolation", "bicubic"], "bicubic"),
    "output_kind": (["--output-kind", "probabilities"], "probabilities"),
    "class_names": (["--class-names", "names.txt"], Path("names.txt")),
    "activation": (["--activation", "sigmoid"], "sigmoid"),
    "listen": (["--listen", "127.0.0.1:0", "--listen", "unix:/run/s"], ("127.0.0.1:0", "unix:/run/s")),
    "plaintext": (["--plaintext"], True),
    "drain_s": (["--drain-s", "2.5"], 2.5),
    "socket_mode": (["--socket-mode", "660"], "660"),
    "tls_certificate": (["--tls-certificate", "server.pem"], Path("server.pem")),
    "tls_key": (["--tls-key", "server.key"], Path("server.key")),
    "tls_client_ca": (["--tls-client-ca", "ca.pem"], Path("ca.pem")),
    "tokens": (["--tokens", "tokens"], Path("tokens")),
    "admin_tokens": (["--admin-tokens", "admins"], Path("admins")),
    "max_peer_streams": (["--max-peer-streams", "4"], 4),
    "metrics_listen": (["--metrics-listen", "127.0.0.1:9000"], "127.0.0.1:9000"),
    "log_format": (["--log-format", "json"], "json"),
    "stuck_s": (["--stuck-s", "5"], 5.0),
    "device": (["--device=cpu"], "cpu"),
    "threads": (["--threads", "3"], 3),
    "dedicated_cpus": (["--dedicated-cpus"], True),
    "max_chunk_rows": (["--max-chunk-rows", "16"], 16),
    "max_chunk_s": (["--max-chunk-s", "0.1"], 0.1),
    "device_memory_limit": (["--device-memory-limit", "1000000"], 1_000_000),
    "precision": (["--precision", "bfloat16"], "bfloat16"),
    "fold": (["--fold"], True),
    "channels_last": (["--channels-last"], True),
    "compile": (["--compile"], True),
    "cuda_graphs": (["--cuda-graphs"], True),
    "reproducible": (["--reproducible"], True),
    "reproducible_rows": (["--reproducible-rows", "4"], 4),
    "max_example_rows": (["--max-example-rows", "9"], 9),
    "max_message_bytes": (["--max-message-bytes", "5000"], 5000),
    "max_image_pixels": (["--max-image-pixels", "100"], 100),
    "max_decode_s": (["--max-decode-s", "0.5"], 0.5),
    "max_in_flight": (["--max-in-flight", "7"], 7),
    "max_in_flight_bytes": (["--max-in-flight-bytes", "5000"], 5000),
    "max_caller_rows": (["--max-caller-rows", "500"], 500),
    "max_stream_in_flight": (["--max-stream-in-flight", "2"], 2),
    "max_stream_age_s": (["--max-stream-age-s", "60"], 60.0),
    "stalled_write_s": (["--stalled-write-s", "5"], 5.0),
    "max_arrival_s": (["--max-arrival-s", "5"], 5.0),
    "keepalive_s": (["--keepalive-s", "10"], 10.0),
    "shared_memory": (["--shared-memory", "/dev/shm"], Path("/dev/shm")),
    "max_rendered_pixels": (["--max-rendered-pixels", "100"], 100),
    "max_region_bytes": (["--max-region-bytes", "4096"], 4096),
    "max_stream_regions": (["--max-stream-regions", "2"], 2),
}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_flag_sets_its_field_alone(name: str) -> None:
    flags, value = FLAGS[name]
    assert changed(read_settings(flags)) == {name: value}


VARIABLES = {
    "model": ("python:mine:net", "python:mine:net"),
    "weights": ("net.pt", Path("net.pt")),
    "input_size": ("3,224,224", (3, 224, 224)),
    "mean": ("0.5, 0.4, 0.3", (0.5, 0.4, 0.3)),
    "std": ("[1, 2, 3]", (1.0, 2.0, 3.0)),
    "resize": ("288x256", "288x256"),
    "listen": ("0.0.0.0:50051,unix:/run/s", ("0.0.0.0:50051", "unix:/run/s")),
    "plaintext": ("true", True),
    "drain_s": ("2.5", 2.5),
    "max_chunk_rows": ("16", 16),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_sets_its_field_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VARIABLES[name]
    monkeypatch.setenv(PREFIX + name.upper(), text)
    assert changed(read_settings([])) == {name: value}


def test_one_address_in_a_variable_needs_no_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDELIGHT_LISTEN", "127.0.0.1:0")
    assert read_settings([]).listen == ("127.0.0.1:0",)
    monkeypatch.setenv("SIDELIGHT_LISTEN", '["127.0.0.1:1"]')
    assert read_settings([]).listen == ("127.0.0.1:1",)


@pytest.mark.parametrize(
    "addresses",
    [("[::1]:0",), ("[::1]:0", "127.0.0.1:0"), ("127.0.0.1:0", "[::1]:0")],
    ids=["alone", "first", "last"],
)
def test_an_address_of_ipv6_has_brackets_of_its_own(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_settings([word for each in addresses for word in ("--listen", each)]).listen == addresses
    monkeypatch.setenv("SIDELIGHT_LISTEN", ",".join(addresses))
    assert read_settings([]).listen == addresses


def test_the_file_sets_its_fields_alone() -> None:
    write_file(
        'model = "python:mine:net"\n'
        "input_size = [3, 8, 8]\n"
        "mean = [0.5, 0.5, 0.5]\n"
        "resize = 9\n"
        'listen = ["unix:/run/s"]\n'
        "plaintext = true\n"
    )
    assert changed(read_settings([])) == {
        "model": "python:mine:net",
        "input_size": (3, 8, 8),
        "mean": (0.5, 0.5, 0.5),
        "resize": 9,
        "listen": ("unix:/run/s",),
        "plaintext": True,
    }


@pytest.mark.parametrize("flag", [False, True], ids=["no flag", "flag"])
@pytest.mark.parametrize("variable", [False, True], ids=["no variable", "variable"])
@pytest.mark.parametrize("file", [False, True], ids=["no file", "file"])
def test_the_first_source_that_sets_a_field_wins(
    flag: bool, variable: bool, file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file:
        write_file('threads = 2\nlisten = ["localhost:2"]\nplaintext = true\n')
    if variable:
        monkeypatch.setenv("SIDELIGHT_THREADS", "3")
        monkeypatch.setenv("SIDELIGHT_LISTEN", "localhost:3")
        monkeypatch.setenv("SIDELIGHT_PLAINTEXT", "1")
    settings = read_settings(["--threads", "4", "--listen", "localhost:4", "--no-plaintext"] if flag else [])
    wins = 4 if flag else 3 if variable else 2 if file else None
    assert settings.threads == (wins or Settings().threads)
    assert settings.listen == ((f"localhost:{wins}",) if wins else Settings().listen)
    assert settings.plaintext is (wins in (2, 3))


def test_each_field_is_settled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    write_file("threads = 1\ndrain_s = 1\nmax_in_flight = 1\n")
    monkeypatch.setenv("SIDELIGHT_DRAIN_S", "2")
    monkeypatch.setenv("SIDELIGHT_MAX_IN_FLIGHT", "2")
    settings = read_settings(["--max-in-flight", "3"])
    assert changed(settings) == {"threads": 1, "drain_s": 2, "max_in_flight": 3}


def test_a_flag_back_to_its_default_still_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDELIGHT_THREADS", "3")
    assert read_settings(["--threads", "0"]).threads == 0


def test_reading_the_settings_twice_shares_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file("threads = 2\n")
    with monkeypatch.context() as patched:
        patched.setenv("SIDELIGHT_MAX_IN_FLIGHT", "3")
        assert changed(read_settings(["--max-chunk-rows", "4", "--listen", "localhost:1", "--plaintext"])) == {
            "threads": 2,
            "max_in_flight": 3,
            "max_chunk_rows": 4,
            "listen": ("localhost:1",),
            "plaintext": True,
        }
    FILE.unlink()
    assert read_settings([]) == Settings()


def test_settings_made_in_a_program_read_neither_variables_nor_file(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings()
    write_file("threads = 2\n")
    monkeypatch.setenv("SIDELIGHT_MAX_IN_FLIGHT", "3")
    assert Settings() == default


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--max-chunk-row", "--max-chunk-rows"),
        ("--max_chunk_rows", "--max-chunk-rows"),
        ("--clsas-names", "--class-names"),
    ],
    ids=["one letter short", "underscores", "transposed"],
)
def test_an_unknown_flag_is_refused_with_a_similar_name(
    flag: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings([flag, "4"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line
    assert f"did you mean {meant}?" in line


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--threads"], "--threads"), (["stray"], "stray"), (["--plaintext", "yes"], "yes"), (["--quux"], "--quux")],
    ids=["no value", "no flag", "a value too many", "like no other"],
)
def test_wrong_flags_are_refused_in_one_line(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sidelight-server: ")
    assert word in line


def test_an_unknown_key_of_the_file_is_refused_with_a_similar_name() -> None:
    write_file("max_chunk_row = 4\n")
    with pytest.raises(ConfigurationError) as caught:
        read_settings([])
    assert (
        str(caught.value) == "max_chunk_row: there is no such setting in sidelight.toml; did you mean max_chunk_rows?"
    )


def test_a_table_of_the_file_is_refused() -> None:
    write_file("[server]\nthreads = 4\n")
    with pytest.raises(ConfigurationError, match=r"^server: there is no such setting in sidelight\.toml"):
        read_settings([])


def test_a_file_that_is_no_toml_is_refused() -> None:
    write_file("threads = \n")
    with pytest.raises(ConfigurationError, match=r"sidelight\.toml.*line 1"):
        read_settings([])


def test_a_misspelt_variable_is_reported_and_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDELIGHT_MAX_CHUNK_ROW", "4")
    monkeypatch.setenv("SIDELIGHT_SERVICE_HOST", "10.0.0.1")  # as Kubernetes sets for a service of that name
    monkeypatch.setenv("SIDELIGHT_PORT_50051_TCP", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("SIDELIGHT_THREADS", "2")
    assert misspelt_variables() == ["SIDELIGHT_MAX_CHUNK_ROW is not a setting; did you mean SIDELIGHT_MAX_CHUNK_ROWS?"]
    assert changed(read_settings([])) == {"threads": 2}


WRONG = {
    "no number": ("threads", "many"),
    "a fraction": ("max_chunk_rows", "2.5"),
    "too small": ("max_chunk_rows", "-1"),
    "too large": ("max_chunk_rows", "5000"),
    "negative": ("drain_s", "-1"),
    "not a number": ("drain_s", "nan"),
    "too few dimensions": ("input_size", "3,224"),
    "a letter among the dimensions": ("input_size", "3,x,224"),
    "an unknown filter": ("interpolation", "cubic"),
    "an unknown way to resize": ("resize", "fit"),
    "unknown outputs": ("output_kind", "scores"),
    "a limit below the least": ("max_message_bytes", "1"),
    "a limit over the most": ("max_message_bytes", str(2**31)),
    "no batch at once": ("max_in_flight", "0"),
    "a word among the means": ("mean", "0.5,half,0.5"),
}


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
@pytest.mark.parametrize(("name", "value"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_names_its_field(name: str, value: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []
    match source:
        case "flag":
            flags = [f"--{name.replace('_', '-')}={value}"]
        case "variable":
            monkeypatch.setenv(PREFIX + name.upper(), value)
        case "file":
            write_file(f'{name} = "{value}"\n')
    with pytest.raises(ConfigurationError) as caught:
        read_settings(flags)
    assert str(caught.value).startswith(f"{name}: got ")
    assert "\n" not in str(caught.value)


def test_an_empty_list_of_addresses_is_refused() -> None:
    write_file("listen = []\n")
    with pytest.raises(ConfigurationError, match=r"^listen: got \[\]"):
        read_settings([])


def test_labels_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("ant\nbee, honey\nÄlk\n", encoding="utf-8")
    assert Settings(class_names=path).traits()["class_names"] == ("ant", "bee, honey", "Älk")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not utf-8"])
def test_labels_that_cannot_be_read_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"^class_names: {path}: "):
        Settings(class_names=path).traits()
