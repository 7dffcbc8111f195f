# Networks in C within a firmware's own make; GNU make 3.81 or newer.
#
#   include $(shell edgecomp --make-include)
#   digits_PLAN := model/plan.json
#   digits_BUDGET_FLASH := 64K
#   digits_BUDGET_RAM := 32K
#   $(eval $(call edgecomp_model,digits))
#
#   firmware.elf: main.o $(digits_LIB)
#   main.o: $(digits_HEADER)
#   main.o: CPPFLAGS += $(digits_CPPFLAGS)
#
# NAME_LIB is a static library, which is not made where a budget is broken. The header is "network.h", and
# "digits/network.h" where there are several networks. Compilers and options are CC, AR, CFLAGS, as everywhere in make.
# What else may be set, NAME_ before each; edgecompConfig.cmake, beside this file, says what they mean:
# FOLDER (with C that is there, in the place of PLAN), GRAPH, MAX_DROP, MANIFEST, BASELINE, CORE, NAME, WEIGHTS_AT_REST.
#
# EDGECOMP is the command, EDGECOMP_BUILD the folder for all that is written.
EDGECOMP ?= edgecomp
EDGECOMP_BUILD ?= edgecomp-build
_edgecomp_init := $(dir $(lastword $(MAKEFILE_LIST)))../__init__.py
_edgecomp_version := $(shell sed -n 's/^__version__ = //p' $(_edgecomp_init))

# Write a file only where it says something else, so that what depends on it is made again only then.
_edgecomp_note = $(shell mkdir -p $(dir $(1)) && echo '$(subst ','\'',$(2))' | cmp -s - $(1) || echo '$(subst ','\'',$(2))' > $(1))

_edgecomp_dir = $(if $($(1)_FOLDER),$($(1)_FOLDER),$(EDGECOMP_BUILD)/$(1))
_edgecomp_graph = $(if $($(1)_GRAPH),$($(1)_GRAPH),$(dir $($(1)_PLAN))graph.edgecomp)
_edgecomp_manifest = $(if $($(1)_MANIFEST),$($(1)_MANIFEST),$(if $($(1)_PLAN),$(if $($(1)_MAX_DROP),$(wildcard $(dir $($(1)_PLAN))manifest.json))))
_edgecomp_export = $($(1)_PLAN) --graph $(_edgecomp_graph) --format c --weights-at-rest $(if $($(1)_WEIGHTS_AT_REST),$($(1)_WEIGHTS_AT_REST),native) $(if $($(1)_NAME),--name $($(1)_NAME)) --force -o $(_edgecomp_dir)
_edgecomp_limits = $(if $($(1)_BUDGET_FLASH),--max-flash $($(1)_BUDGET_FLASH)) $(if $($(1)_BUDGET_RAM),--max-ram $($(1)_BUDGET_RAM)) $(if $($(1)_MAX_DROP),--max-drop $($(1)_MAX_DROP))
_edgecomp_known = $(_edgecomp_manifest) $($(1)_BASELINE) $(if $($(1)_FOLDER),$(wildcard $($(1)_FOLDER)/manifest.json))
_edgecomp_gate = $(_edgecomp_limits) $(if $($(1)_CORE),--target $($(1)_CORE)) $(if $($(1)_BASELINE),--baseline $($(1)_BASELINE)) $(if $(_edgecomp_manifest),--manifest $(_edgecomp_manifest))

define edgecomp_model
_edgecomp_goal := $$(.DEFAULT_GOAL)
$(if $(filter 1,$(words $($(1)_PLAN) $($(1)_FOLDER))),,$(error edgecomp_model $(1): expected either $(1)_PLAN, to write the C from, or $(1)_FOLDER, where it is; no path with spaces))
$(1)_DIR := $(_edgecomp_dir)
$(1)_HEADER := $(_edgecomp_dir)/network.h
$(1)_LIB := $(EDGECOMP_BUILD)/lib$(1).a
$(1)_CPPFLAGS := -I$(_edgecomp_dir) -I$(EDGECOMP_BUILD)

$(if $($(1)_PLAN),
$(call _edgecomp_note,$(EDGECOMP_BUILD)/$(1).export.txt,edgecomp $(_edgecomp_version): $(EDGECOMP) $(_edgecomp_export))
$(_edgecomp_dir)/network.c: $($(1)_PLAN) $(_edgecomp_graph) $(EDGECOMP_BUILD)/$(1).export.txt $(_edgecomp_init)
	$(EDGECOMP) export $(_edgecomp_export)
# All four are written at once and this one first.
$(_edgecomp_dir)/network.h $(_edgecomp_dir)/edgecomp_kernels.c $(_edgecomp_dir)/edgecomp_kernels.h: $(_edgecomp_dir)/network.c ;
,
$(call _edgecomp_note,$(EDGECOMP_BUILD)/$(1)/network.h,#include "$(abspath $(_edgecomp_dir))/network.h"))

$(EDGECOMP_BUILD)/$(1).network.o: $(_edgecomp_dir)/network.c $(_edgecomp_dir)/network.h $(_edgecomp_dir)/edgecomp_kernels.h
$(EDGECOMP_BUILD)/$(1).edgecomp_kernels.o: $(_edgecomp_dir)/edgecomp_kernels.c $(_edgecomp_dir)/edgecomp_kernels.h
$(EDGECOMP_BUILD)/$(1).network.o $(EDGECOMP_BUILD)/$(1).edgecomp_kernels.o:
	$$(CC) $$(CPPFLAGS) $$(CFLAGS) -ffunction-sections -fdata-sections -c -o $$@ $$<

$(EDGECOMP_BUILD)/lib$(1).a: $(EDGECOMP_BUILD)/$(1).network.o $(EDGECOMP_BUILD)/$(1).edgecomp_kernels.o
	rm -f $$@
	$$(AR) rcs $$@ $$^

$(if $(strip $(_edgecomp_limits)),
$(call _edgecomp_note,$(EDGECOMP_BUILD)/$(1).budget.txt,edgecomp $(_edgecomp_version): $(strip $(_edgecomp_gate)))
# A changed budget is judged anew and nothing else is done: what is compiled only waits for the judgement.
$(EDGECOMP_BUILD)/$(1).network.o $(EDGECOMP_BUILD)/$(1).edgecomp_kernels.o $(EDGECOMP_BUILD)/lib$(1).a: | $(EDGECOMP_BUILD)/$(1).gate.txt
$(EDGECOMP_BUILD)/$(1).gate.txt: $(_edgecomp_dir)/network.c $(_edgecomp_dir)/edgecomp_kernels.c $(_edgecomp_known) $(EDGECOMP_BUILD)/$(1).budget.txt
	$(EDGECOMP) gate $(_edgecomp_dir) $(_edgecomp_gate) --report $$@)

# What is made by default is the affair of who includes this.
.DEFAULT_GOAL := $$(_edgecomp_goal)
endef
