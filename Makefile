# SPDX-License-Identifier: GPL-2.0
#
# Everything is driven from here; Kbuild describes the kernel module itself.

FLAVOUR ?= lab
SECONDS ?= 60
VENDOR ?= all
KDIR ?= /lib/modules/$(shell uname -r)/build
export V FLAVOUR KDIR KERNEL_SRC KERNEL_TARBALL KVMI_CACHE

B := tools/build
LAB := tools/target/x86_64-unknown-linux-gnu/release/lab

.NOTPARALLEL:
.PHONY: help setup kernel lab-modules selftests tools guest guest-module fakehost-module lab-guests bochs \
	demo test stress lab check bench modules modules_install clean distclean

help:
	@echo 'For a first look and for tests, on any machine (installs what it lacks):'
	@echo '  make demo               look into a running guest from outside'
	@echo '  make test               all tests in emulated hosts   [FLAVOUR=lab|debug]'
	@echo '                                                        [VENDOR=amd|intel] [SHORT=1]'
	@echo '  make stress             everything at once, for long  [FLAVOUR=lab|debug] [SECONDS=60]'
	@echo '  make lab                a shell in the emulated host  [FLAVOUR=lab|debug]'
	@echo '  make check              formatting, lints, unit tests'
	@echo '  make bench              what introspection costs, compared with an unpatched kernel'
	@echo
	@echo 'For a kernel of your own, patched with patches/7.2:'
	@echo '  make modules            build kvmi_host.ko and kvmmem.ko against KDIR=/path/of/its/build'
	@echo '  make modules_install    install them there'
	@echo '                          [GUEST=1] kvmmem.ko only, for any 7.2 kernel with Rust'
	@echo
	@echo 'Parts of the above:'
	@echo '  make setup              install missing tools (Debian 12, 13)'
	@echo '  make kernel             build the patched kernel      [FLAVOUR=lab|debug|stock]'
	@echo '  make tools              build the programs in tools/'
	@echo '  make clean              remove what was built here'
	@echo '  make distclean          remove the cache of kernels too'
	@echo
	@echo 'V=1 shows all output.  KERNEL_SRC=tree or KERNEL_TARBALL=file replace the'
	@echo "distribution's source of Linux 7.2.  KVMI_CACHE=folder moves the cache."

setup:
	@$(B)/setup.sh

kernel: setup
	@$(B)/kernel.sh $(FLAVOUR)

lab-modules: kernel
	@$(B)/modules.sh build/kernel/$(FLAVOUR)/kdir build/modules/$(FLAVOUR) modules

selftests: kernel
	@$(B)/selftests.sh $(FLAVOUR)

tools: setup
	@$(B)/tools.sh

guest: setup
	@$(B)/guest.sh

# The host machine for Intel; QEMU is the other one.
bochs: setup
	@$(B)/bochs.sh

guest-module: kernel
	@$(B)/modules.sh build/kernel/$(FLAVOUR)/kdir build/modules/$(FLAVOUR)-guest modules \
		M=$(CURDIR)/tools/lab/guest/patcher

# kvmmem.ko with a host of its own built in, for tests of what a real one does rarely.
fakehost-module: kernel
	@$(B)/modules.sh build/kernel/$(FLAVOUR)/kdir build/modules/$(FLAVOUR)-fakehost modules \
		CONFIG_KVMI_HOST= KVMMEM_HOST=tools/lab/guest/fakehost/fakehost.o

# Guests have the lab's kernel, also in a host with another one.
lab-guests:
	@$(MAKE) --no-print-directory lab-modules guest-module FLAVOUR=lab

demo: FLAVOUR := lab
demo: lab-modules tools guest guest-module
	@$(LAB) run --flavour $(FLAVOUR) --name demo -- sh tools/lab/guest/demo.sh

test: $(if $(filter amd,$(VENDOR)),,bochs) \
      $(if $(filter-out lab,$(FLAVOUR)),$(if $(SHORT)$(filter intel,$(VENDOR)),,lab-guests)) \
      lab-modules selftests tools guest guest-module fakehost-module
	@SHORT=$(SHORT) $(B)/test.sh $(FLAVOUR) $(VENDOR)

stress: lab-modules tools
	@$(LAB) run --flavour $(FLAVOUR) --name stress --timeout $$((2 * $(SECONDS) + 600)) -- \
		sh tools/lab/guest/stress.sh $(FLAVOUR) $(SECONDS)

lab: lab-modules tools guest
	@$(LAB) shell --flavour $(FLAVOUR)

check: FLAVOUR := lab
check: kernel tools
	@$(B)/check.sh

bench: FLAVOUR := lab
bench: lab-modules tools
	@$(B)/kernel.sh stock
	@$(B)/bench.sh

modules modules_install:
	@$(B)/modules.sh $(KDIR) build/modules/kdir $@ $(if $(GUEST),CONFIG_KVMI_HOST=)

clean:
	rm -rf build tools/target

distclean: clean
	@$(B)/distclean.sh
