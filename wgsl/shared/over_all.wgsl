{# Over all invocations of the workgroup, in a fixed order, by pairs: the rounds of a tree wait less than a chain does. A second call may begin
   while others still read the first one's result: it writes `folded` after its first barrier. A sum decides whether barriers are reached:
   WebGPU demands that an analysis can see that it is the same for all invocations. #}
{% macro pairs(function, array, first, stride, count) %}
{% for k in range(count) %}
    var v{{ k }} = {{ array }}[{{ first }} + {{ k * stride }}u];
{% endfor %}
{% for half in [16, 8, 4, 2, 1] if half < count %}
{% for k in range(half) %}
    v{{ k }} = {{ function }}(v{{ k }}, v{{ k + half }});
{% endfor %}
{% endfor %}
{% endmacro %}

fn all_{{ function }}(value: vec4<u32>, lid: u32) -> vec4<u32> {
    scratch[lid] = value;
    workgroupBarrier();
    if (lid < {{ groups }}u) {
{{ pairs(function, "scratch", "lid", groups, fold) }}
        folded[lid] = v0;
    }
{% if function == "plus" %}
    let same = workgroupUniformLoad(&folded);
{{ pairs(function, "same", "0u", 1, groups) }}
{% else %}
    workgroupBarrier();
{{ pairs(function, "folded", "0u", 1, groups) }}
{% endif %}
    return v0;
}
