/* SPDX-License-Identifier: Apache-2.0 */
/* The programs, each in a section of its own, and the maps that they share. */
#include "pod_in.h"
#include "pod_out.h"
#include "probe.h"
#include "wire_in.h"
#include "wire_out.h"
