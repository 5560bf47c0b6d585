{# Over all invocations of the workgroup, in a fixed order. A second call may begin while others still read the first one's result: it writes
   `folded` after its first barrier. #}

fn all_{{ function }}(value: vec4<u32>, lid: u32) -> vec4<u32> {
    scratch[lid] = value;
    workgroupBarrier();
    if (lid < {{ groups }}u) {
        var v = scratch[lid];
{% for k in range(1, fold) %}
        v = {{ function }}(v, scratch[lid + {{ k * groups }}u]);
{% endfor %}
        folded[lid] = v;
    }
    workgroupBarrier();
    var v = folded[0];
    for (var k = 1u; k < {{ groups }}u; k++) {
        v = {{ function }}(v, folded[k]);
    }
    return v;
}
