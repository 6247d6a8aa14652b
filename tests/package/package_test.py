"""The installed package, as an archive and as a shared library: what is in it, what it shows, what links it from outside.

python3 package_test.py BUILD_DIR SOURCE_DIR VERSION [unittest arguments]

BUILD_DIR is a finished build. The other kind of library is built by itself, in BUILD_DIR/package.
"""
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

BUILD, SOURCE, VERSION = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
HERE = pathlib.Path(__file__).resolve().parent


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def cache_value(build, name):
    return re.search(rf"^{name}:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.M).group(1)


def public_words():
    """The identifiers of the public headers, comments aside."""
    text = "".join(header.read_text() for header in (SOURCE / "include" / "thriftattn").glob("*.h"))
    return set(re.findall(r"\w+", re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)))


class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        outer_is_shared = cache_value(BUILD, "BUILD_SHARED_LIBS") == "ON"
        other = BUILD / "package" / ("archive" if outer_is_shared else "shared")
        run("cmake", "-S", SOURCE, "-B", other, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DTHRIFTATTN_MODEL=OFF",
            "-DTHRIFTATTN_TESTS=OFF", f"-DBUILD_SHARED_LIBS={'OFF' if outer_is_shared else 'ON'}",
            f"-DTHRIFTATTN_CUDA={cache_value(BUILD, 'THRIFTATTN_CUDA')}", "-DTHRIFTATTN_CUDA_ARCHITECTURES=90a")
        run("cmake", "--build", other)
        builds = {"shared": BUILD, "archive": other} if outer_is_shared else {"archive": BUILD, "shared": other}
        cls.prefixes = {}
        for kind, build in builds.items():
            cls.prefixes[kind] = pathlib.Path(cls.folder.name) / kind
            run("cmake", "--install", build, "--prefix", cls.prefixes[kind])
        cls.libdir = cache_value(BUILD, "CMAKE_INSTALL_LIBDIR")

    def test_holds_headers_licence_and_program(self):
        for prefix in self.prefixes.values():
            headers = {path.name for path in (SOURCE / "include" / "thriftattn").iterdir()}
            self.assertEqual({path.name for path in (prefix / "include" / "thriftattn").iterdir()}, headers)
            self.assertTrue(list(prefix.glob("share/doc/*/LICENSE")))
        if cache_value(BUILD, "THRIFTATTN_MODEL") == "ON":
            prefix = self.prefixes["shared" if cache_value(BUILD, "BUILD_SHARED_LIBS") == "ON" else "archive"]
            self.assertIn(VERSION, run(prefix / "bin" / "thriftattn", "--version"))

    def test_both_interfaces_and_both_kinds_give_the_same_bits(self):
        printed = {}
        for kind, prefix in self.prefixes.items():
            env = {"PATH": "/usr/bin:/bin", "PKG_CONFIG_PATH": str(prefix / self.libdir / "pkgconfig"),
                   "LD_LIBRARY_PATH": str(prefix / self.libdir)}
            flags = run("pkg-config", "--cflags", "--libs", f"thriftattn = {VERSION}", env=env).split()
            program = prefix / "decode_c"
            run("cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", HERE / "decode.c", "-o", program, *flags,
                env=env)
            printed[kind, "c"] = run(program, env=env)
            build = prefix / "consumer"
            run("cmake", "-S", HERE, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}",
                f"-DWANTED={VERSION.rsplit('.', 1)[0]}")
            run("cmake", "--build", build)
            printed[kind, "c++"] = run(build / "decode_cc")
        self.assertRegex(printed["archive", "c"], rf"^{re.escape(VERSION)} [0-9a-f]{{16}}\n$")
        self.assertEqual(len(set(printed.values())), 1, printed)

    def test_another_minor_version_is_refused(self):
        major, minor, _ = VERSION.split(".")
        with self.assertRaisesRegex(AssertionError, "not compatible|version"):
            run("cmake", "-S", HERE, "-B", pathlib.Path(self.folder.name) / "refused", "-G", "Ninja",
                f"-DCMAKE_PREFIX_PATH={self.prefixes['archive']}", f"-DWANTED={major}.{int(minor) + 1}")

    def test_the_shared_library_shows_the_public_names_alone(self):
        soname = "libthriftattn.so." + VERSION.rsplit(".", 1)[0]
        library = self.prefixes["shared"] / self.libdir / soname
        self.assertIn(f"[{soname}]", run("readelf", "-d", library))
        names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
        c_names = sorted(name for name in names if not name.startswith("_Z"))
        self.assertEqual(c_names, (SOURCE / "tests" / "c_api" / "symbols.txt").read_text().split(),
                         "tests/c_api/symbols.txt does not name the C functions")
        words, shown = public_words(), 0
        for name in run("c++filt", *(name for name in names if name.startswith("_Z"))).splitlines():
            qualified = name.split("(")[0].split("[")[0]
            shown += 1
            self.assertTrue(qualified.startswith("thriftattn::"), name)
            self.assertLessEqual(set(re.findall(r"\w+", qualified)), words, name)
        self.assertGreater(shown, 20)


if __name__ == "__main__":
    for tool in ("cmake", "ninja", "cc", "pkg-config", "nm", "c++filt", "readelf"):
        if not shutil.which(tool):
            sys.exit(f"package_test.py: {tool} is missing")
    unittest.main(argv=sys.argv[:1] + sys.argv[4:])
