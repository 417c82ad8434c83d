/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints of kvmi_host.ko; see Documentation/observability.md.
 *
 * Each begins with who is concerned: the number of the session, counted since
 * the module was loaded, and the process that created the VM, as whoever hooked
 * the VM sees it.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvmi

#if !defined(_TRACE_KVMI_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_KVMI_H

#include <linux/tracepoint.h>

/* Stands for the index of a vCPU where the VM as a whole is meant. */
#define KVMI_TRACE_VM	(-1)

/* A VM was hooked, by the process @hooked_by of the initial pid namespace. */
TRACE_EVENT(kvmi_hook,
	TP_PROTO(u32 session, s32 vmm, s32 hooked_by, const u8 *uuid),
	TP_ARGS(session, vmm, hooked_by, uuid),

	TP_STRUCT__entry(
		__field(u32, session)
		__field(s32, vmm)
		__field(s32, hooked_by)
		__array(u8, uuid, 16)
	),

	TP_fast_assign(
		__entry->session = session;
		__entry->vmm = vmm;
		__entry->hooked_by = hooked_by;
		memcpy(__entry->uuid, uuid, 16);
	),

	TP_printk("session=%u vmm=%d hooked_by=%d uuid=%pUb",
		  __entry->session, __entry->vmm, __entry->hooked_by,
		  __entry->uuid)
);

/* A VM was unhooked: nothing of the session runs any more. */
TRACE_EVENT(kvmi_unhook,
	TP_PROTO(u32 session, s32 vmm),
	TP_ARGS(session, vmm),

	TP_STRUCT__entry(
		__field(u32, session)
		__field(s32, vmm)
	),

	TP_fast_assign(
		__entry->session = session;
		__entry->vmm = vmm;
	),

	TP_printk("session=%u vmm=%d", __entry->session, __entry->vmm)
);

/* A command has arrived. @size: bytes of its payload */
TRACE_EVENT(kvmi_command,
	TP_PROTO(u32 session, s32 vmm, s32 vcpu, u16 id, u32 seq, u16 size),
	TP_ARGS(session, vmm, vcpu, id, seq, size),

	TP_STRUCT__entry(
		__field(u32, session)
		__field(s32, vmm)
		__field(s32, vcpu)
		__field(u32, seq)
		__field(u16, id)
		__field(u16, size)
	),

	TP_fast_assign(
		__entry->session = session;
		__entry->vmm = vmm;
		__entry->vcpu = vcpu;
		__entry->seq = seq;
		__entry->id = id;
		__entry->size = size;
	),

	TP_printk("session=%u vmm=%d vcpu=%d id=%u seq=%u size=%u",
		  __entry->session, __entry->vmm, __entry->vcpu, __entry->id,
		  __entry->seq, __entry->size)
);

/* A reply is about to be sent. @error: of the protocol; @size: of its data */
TRACE_EVENT(kvmi_reply,
	TP_PROTO(u32 session, s32 vmm, u16 id, u32 seq, s32 error, u16 size),
	TP_ARGS(session, vmm, id, seq, error, size),

	TP_STRUCT__entry(
		__field(u32, session)
		__field(s32, vmm)
		__field(u32, seq)
		__field(s32, error)
		__field(u16, id)
		__field(u16, size)
	),

	TP_fast_assign(
		__entry->session = session;
		__entry->vmm = vmm;
		__entry->seq = seq;
		__entry->error = error;
		__entry->id = id;
		__entry->size = size;
	),

	TP_printk("session=%u vmm=%d id=%u seq=%u error=%d size=%u",
		  __entry->session, __entry->vmm, __entry->id, __entry->seq,
		  __entry->error, __entry->size)
);

/* An event is about to be sent. */
TRACE_EVENT(kvmi_event,
	TP_PROTO(u32 session, s32 vmm, s32 vcpu, u16 event, u32 seq),
	TP_ARGS(session, vmm, vcpu, event, seq),

	TP_STRUCT__entry(
		__field(u32, session)
		__field(s32, vmm)
		__field(s32, vcpu)
		__field(u32, seq)
		__field(u16, event)
	),

	TP_fast_assign(
		__entry->session = session;
		__entry->vmm = vmm;
		__entry->vcpu = vcpu;
		__entry->seq = seq;
		__entry->event = event;
	),

	TP_printk("session=%u vmm=%d vcpu=%d event=%u seq=%u",
		  __entry->session, __entry->vmm, __entry->vcpu, __entry->event,
		  __entry->seq)
);

/* The reply to an event has arrived. */
TRACE_EVENT(kvmi_event_reply,
	TP_PROTO(u32 session, s32 vmm, s32 vcpu, u16 event, u8 action, u32 seq),
	TP_ARGS(session, vmm, vcpu, event, action, seq),

	TP_STRUCT__entry(
		__field(u32, session)
		__field(s32, vmm)
		__field(s32, vcpu)
		__field(u32, seq)
		__field(u16, event)
		__field(u8, action)
	),

	TP_fast_assign(
		__entry->session = session;
		__entry->vmm = vmm;
		__entry->vcpu = vcpu;
		__entry->seq = seq;
		__entry->event = event;
		__entry->action = action;
	),

	TP_printk("session=%u vmm=%d vcpu=%d event=%u action=%u seq=%u",
		  __entry->session, __entry->vmm, __entry->vcpu, __entry->event,
		  __entry->action, __entry->seq)
);

#endif /* _TRACE_KVMI_H */

/* This part must be outside of the protection. */
#include <trace/define_trace.h>
